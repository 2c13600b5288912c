import sys

from ch_remote.main import main

sys.exit(main())
