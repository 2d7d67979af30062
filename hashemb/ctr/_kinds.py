"""placeholder"""
def looks_like_count(a, b): return False
