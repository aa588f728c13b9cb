"""`veneer ui`: a page in the browser over the commands, which run as processes of their own."""
