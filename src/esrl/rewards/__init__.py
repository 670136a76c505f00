"""Text metrics as rewards, and the contract with reward functions of any origin."""
