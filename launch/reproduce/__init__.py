"""The paper's runs: expected curves, standing after each validation, verdict and card."""
