"""Recipe of the embedded checkpoints: `gvu mini pretrain STAGE`, in the order vae, vision, decoder, detector, language, pack."""
