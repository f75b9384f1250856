"""Flows as files: `rf.save(path, flow)` and `rf.load(path)`.

files        one file of safetensors: arrays by name, config or structure as metadata
structure    a composed flow as JSON, and back, by the public classes of this package alone
variables    the arrays of a flow by collection and name, and a flow of such arrays
upgrades     the names that arrays had in files and checkpoints of earlier versions
config_json  configs as JSON text
whole_files  files that appear whole or not at all
"""
