"""SAEs between jaxsae and the libraries that it exchanges files with: each reads what the other wrote."""
