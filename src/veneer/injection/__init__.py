"""Class swap, dispatch and routing of adapted layers; may import methods and everything below it."""
