"""What has no model and no stage: files, snapshots, progress, contexts."""
