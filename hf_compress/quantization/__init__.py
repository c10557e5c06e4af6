"""Fewer bits: grids, calibration, sensitivity, and training that knows of them."""

METHODS = {  # name on the command line -> (module, config, trainer); what needs no training is `quantize`
    "qbert": ("hf_compress.quantization.qbert", "QBertConfig", "QBertTrainer"),
}
