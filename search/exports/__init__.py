"""Designs as folders that others can trust: written whole or not at all, hashed, verified.

order      what is asked for: a design, and with which weights
formats    the table of formats and their writers
folder     scratch folder, writer, hashes, reading back, the final place
facts      costs, scores and provenance as JSON
card       README.md
genome     the format `genome`
hf         the format `hf`: bundle (its code), weights, tokenizer; modeling_mendel,
           configuration_mendel and mendel_parts are the code's own files
proof      hashes; verify and verify_model read them and run the checks
fla        a genome as a model of flash-linear-attention
flame      the format `flame`
"""
