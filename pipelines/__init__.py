"""What makes data: one module a DVC stage, run from the checkout as ``python -m pipelines.<stage>``."""
