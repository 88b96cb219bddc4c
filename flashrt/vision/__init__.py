"""Pictures of users, as pixels."""
