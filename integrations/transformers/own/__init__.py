"""What both ways share: probes, refusals, keeping, a cache taken apart."""
