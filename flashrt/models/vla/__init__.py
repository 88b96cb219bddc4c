"""What vision-language-action policies share."""
