"""Saves flows to files and loads them: `rf.save(path, flow)` and `rf.load(path)`.

files           one safetensors file: arrays by name, and the config or structure as metadata
structure       converts a composed flow to JSON and back, with only the public classes of this package
variables       the arrays of a flow by collection and name
upgrades        the names of arrays in files and checkpoints of earlier versions
config_json     converts configs to JSON and back
config_upgrade  the format of configs in earlier versions
whole_files     writes files atomically
checksums       tells whether files or arrays have changed since they were written
"""
