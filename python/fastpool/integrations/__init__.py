"""fastpool inside other projects: each module serves one of them, and nothing here is imported by `import fastpool`."""
