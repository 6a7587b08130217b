"""Recommendations for millions of users: from parquet to parquet, resumable, in as many processes as there are."""
