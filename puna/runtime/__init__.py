"""What every stage stands on: errors, files, manifests, devices, seeds, progress."""
