"""`veneer ui`: a page in the browser over the commands, which run as processes; may import recipes and everything below."""
