"""The cache: bytes by key, on disk, shared by processes and verified on every read. In: key factors and bytes. Out: the same bytes, or none.

It never imports torch and never unpickles or executes what it keeps.
"""

# ruff: noqa: F401  (what is imported here is what the package hands on)

from piecework.runtime.cache.artifacts import StandaloneCompiledArtifacts
from piecework.runtime.cache.collector import CollectionReport, collect_garbage
from piecework.runtime.cache.entry import CacheEntry, CacheResult, CacheStats
from piecework.runtime.cache.explanation import Explanation, explain
from piecework.runtime.cache.factors import Difference, Factor, KeyFactors, content_key
from piecework.runtime.cache.safety import cache_disabled, default_root
from piecework.runtime.cache.store import CacheStore
from piecework.runtime.cache.survey import list_entries, verify_cache
