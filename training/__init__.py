"""How the demo model was made: its world, its trainers, its detector. The engine never imports this folder."""
