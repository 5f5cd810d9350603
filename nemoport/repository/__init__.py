"""A Triton model repository on disk: what is published to it, staged, proven and promoted.

repository/                      what tritonserver is started on: models, and nothing else
  support-8b/config.pbtxt        lists the live versions
  support-8b/7/                  a live version
  support-8b/staging-8/          a staged one; Triton skips a directory whose name is no number
repository.staging/
  classifier/                    a model that was never live; a server in its default mode refuses to start on a
                                 repository with a model that has no version to serve
repository.evidence/
  support-8b/7/                  what is known of a version: manifest, ledger, verdict, origin
"""
