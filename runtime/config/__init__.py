"""Everything that can be set, in one frozen `compilation.CompilationConfig`."""
