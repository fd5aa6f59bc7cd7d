"""Multimodal language models, asked for the emotions of a clip, and scored with the measures of everything else."""
