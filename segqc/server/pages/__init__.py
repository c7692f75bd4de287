"""The pages that people open in a browser: the queue, a scan, the audit, the loop, and the description of the API."""
