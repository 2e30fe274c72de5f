"""Stage-by-stage training of anyone's layers, in this process: the same trainer, store and recipes as `stackwise run`.

trainer = UnifiedTrainer(config)
trainer.train_all_layers(dataloader, layers)
"""

from stackwise.pipeline.library.stages import StageResult
from stackwise.pipeline.library.trainer import UnifiedTrainer

__all__ = ["StageResult", "UnifiedTrainer"]
