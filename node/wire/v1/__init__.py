"""Modules generated from protos/node/wire/v1: change the .proto files and run `make protos`."""
