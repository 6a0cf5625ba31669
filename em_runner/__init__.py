"""The public interface for authors of handlers. The other packages are internal."""
