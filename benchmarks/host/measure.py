"""What ``peftkern bench`` measures with too."""

from peftkern.cli.bench.measure import BARE as BARE
from peftkern.cli.bench.measure import OURS as OURS
from peftkern.cli.bench.measure import PEFT as PEFT
from peftkern.cli.bench.measure import Work as Work
from peftkern.cli.bench.measure import allocated as allocated
from peftkern.cli.bench.measure import check_equal as check_equal
from peftkern.cli.bench.measure import interleave as interleave
from peftkern.cli.bench.measure import kept_bytes as kept_bytes
