"""Everything that can be set. In: names and values from code, files and command lines. Out: one frozen `compilation.CompilationConfig`."""
