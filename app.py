"""LightX2V Studio, the page:  python app.py [--share] [--host ADDRESS] [--port N]"""

import sys

from app.main import main

if __name__ == "__main__":
    sys.exit(main())
