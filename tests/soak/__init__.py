"""Long and hostile runs: `make soak` at full size, `make test` at a small one."""
