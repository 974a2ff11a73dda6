"""core_v0.19: the release that the patches' targets and the arguments' names come from."""

from megatron_patches.releases.release import Release

RELEASE = Release(series="0.19")
