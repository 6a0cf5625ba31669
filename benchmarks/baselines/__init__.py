"""Other ways to answer the same queries, each as small and as fair as it can be."""
