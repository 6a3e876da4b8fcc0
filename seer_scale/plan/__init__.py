"""What a run will take, before it has been started: `seer-scale plan`."""
