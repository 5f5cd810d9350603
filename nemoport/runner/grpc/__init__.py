"""The KServe protocol over gRPC, on the messages that tritonclient ships."""
