"""What `veneer train` and its like run: data, tasks, trainers; may import checks, model and everything below them."""
