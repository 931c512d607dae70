"""Checkpoints of other programs, in and out: DeepSpeed's, and torch.distributed.checkpoint's (DCP: FSDP, torchtitan).

``deepspeed_read.read`` and ``dcp_read.read`` (on ``dcp_store``) give an ``offline.Source``, which
``offline.write_checkpoint`` publishes as a checkpoint of ours; ``deepspeed_write.write_universal`` and ``dcp_write.write`` go
the other way, and ``offline.stream_file`` writes one safetensors file. None needs ranks or an engine. What a
user asks for is ``dattrain.pretrained.import_checkpoint`` and ``export_checkpoint``; weights of the authors' repositories
are read in ``dattrain.pretrained.import_authors``.
"""
