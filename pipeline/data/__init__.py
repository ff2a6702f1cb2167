"""Token datasets: text to WebDataset shards (`prepare`), and sample numbers to windows of tokens (`loader`).

Importable without torch.  What other packages use:

    from pipeline.data.errors import DataError
    from pipeline.data.loader import WindowDataset, open_windows
    from pipeline.data.prefetch import Prefetcher
    from pipeline.data.manifest import load_manifest
    from pipeline.data.tokenizer import load_tokenizer
"""
