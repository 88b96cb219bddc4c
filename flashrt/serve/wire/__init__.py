"""The routes: what each API's requests and answers look like."""
