"""Numbers of parameters of published models, by family and shape."""

# From the models' safetensors on the Hub, with a tied head counted once.
PUBLISHED = {
  ("deepseek_v3", "deepseek-v3"): 671_026_419_200,  # without the layer of multi-token prediction
  ("gemma3", "gemma-3-1b"): 999_885_952,
  ("gemma3", "gemma-3-4b"): 3_880_263_168,  # the text model; with its vision tower, 4,300,079,472
  ("llama", "smollm2-135m"): 134_515_008,
  ("llama", "llama-3.2-1b"): 1_235_814_400,
  ("llama", "llama-3.2-3b"): 3_212_749_824,
  ("llama", "llama-3.1-8b"): 8_030_261_248,
  ("llama", "llama-3.3-70b"): 70_553_706_496,
  ("llama", "mistral-7b-v0.1"): 7_241_732_096,
  ("qwen2", "qwen2.5-0.5b"): 494_032_768,
  ("qwen2", "qwen2.5-1.5b"): 1_543_714_304,
  ("qwen2", "qwen2.5-7b"): 7_615_616_512,
  ("qwen2", "qwen2.5-14b"): 14_770_033_664,
  ("qwen2", "qwen2.5-32b"): 32_763_876_352,
  ("qwen3", "qwen3-0.6b"): 596_049_920,
  ("qwen3", "qwen3-1.7b"): 1_720_574_976,
  ("qwen3", "qwen3-4b"): 4_022_468_096,
  ("qwen3", "qwen3-8b"): 8_190_735_360,
  ("qwen3", "qwen3-14b"): 14_768_307_200,
  ("qwen3", "qwen3-32b"): 32_762_123_264,
  ("qwen3", "qwen3-30b-a3b"): 30_532_122_624,
}
