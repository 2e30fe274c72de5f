"""What each mode costs in quality: every schedule on one rack, data and seeds, beside plain end-to-end training."""
