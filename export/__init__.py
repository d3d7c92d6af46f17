"""Export of models: SavedModel, LiteRT bundle, preset."""
