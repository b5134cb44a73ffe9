"""How the demo model was made: its world, its trainers, its judge. The engine never imports this folder."""
