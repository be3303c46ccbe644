"""What makes two Python values the same for compiled code. In: data, functions, operators, settings. Out: plain data and digests. Entry point: `values.digest_of`."""
