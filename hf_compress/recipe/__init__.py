"""Stages in a chain or together, cached, resumed and run again only where something above them changed."""

from hf_compress.recipe.options import RecipeError
from hf_compress.recipe.recipe import Recipe, RecipeResult, ready_recipes

__all__ = ["Recipe", "RecipeError", "RecipeResult", "ready_recipes"]
