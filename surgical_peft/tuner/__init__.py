"""The PEFT method: config, layer and model of `peft_type` SURGICAL."""
