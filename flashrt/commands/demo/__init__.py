"""`flashrt demo`: the main job, with every claim checked in that run."""
