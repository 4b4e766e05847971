"""What came out of sweeps: tables and figures from the folders that they leave."""
