import sys

from polarmask_tf.cli import main

sys.exit(main())
