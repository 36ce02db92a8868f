"""Questions, one short Python file each; README.md is the lab book."""
