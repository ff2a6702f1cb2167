"""Token datasets: text to WebDataset shards (`prepare`), and sample numbers to windows of tokens (`loader`).

Importable without torch.  What other packages use:

    from pipeline.data.errors import DataError
    from pipeline.data.loader import Prefetcher, WindowDataset
    from pipeline.data.manifest import load_manifest
    from pipeline.data.tokenizer import load_tokenizer
"""
