// In the colours of the user's theme.
export const STYLE = `
.luna-broker { padding: 12px; font-size: 13px; color: var(--input-text); overflow-y: auto; height: 100%; }
.luna-broker header { display: flex; flex-direction: column; gap: 8px; margin-bottom: 12px; }
.luna-broker h2 { font-size: 16px; font-weight: 600; margin: 0; }
.luna-broker h3 { font-size: 12px; font-weight: 600; margin: 16px 0 4px; color: var(--descrip-text); }
.luna-broker input { width: 100%; padding: 6px 8px; color: inherit; background: var(--comfy-input-bg);
  border: 1px solid var(--border-color); border-radius: 6px; }
.luna-broker p { margin: 4px 0; }
.luna-broker footer { margin-top: 12px; overflow-wrap: anywhere; }
.luna-broker footer + footer { margin-top: 2px; }
.luna-faint { color: var(--descrip-text); font-size: 12px; overflow-wrap: anywhere; }
.luna-figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(80px, 1fr)); gap: 8px; }
.luna-figures div { padding: 8px; border-radius: 8px; background: var(--comfy-input-bg); }
.luna-figures b { display: block; font-size: 16px; white-space: nowrap; }
.luna-figures span { color: var(--descrip-text); font-size: 11px; }
.luna-row { padding: 6px 0 6px 8px; border-bottom: 1px solid var(--border-color); border-left: 3px solid transparent; }
.luna-head { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: 8px; }
.luna-head span:first-child { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.luna-head span:last-child { flex: none; }
.luna-busy { border-left-color: #4caf50; }
.luna-own { border-left-color: #2196f3; }
.luna-row progress { width: 100%; height: 4px; }
.luna-absent { display: flex; flex-direction: column; align-items: center; text-align: center; gap: 6px;
  padding: 24px 8px; }
.luna-absent i { font-size: 28px; color: var(--error-text, #e57373); }
.luna-absent p { overflow-wrap: anywhere; }
`;
