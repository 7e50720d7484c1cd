"""A coverage-guided fuzzer for each reader of files: `make fuzz`.

`forms` makes files of a fuzzer's bytes, `invariants` says what must hold of every file, `seeds` makes the first files,
`run` is the fuzzer.
"""
